"""Videos with one label each."""
