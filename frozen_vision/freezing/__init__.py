"""Which parameters are frozen, and how a frozen model is stored, identified and prepared."""
