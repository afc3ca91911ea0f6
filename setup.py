"""The packages of the distribution; everything else stands in pyproject.toml.

The configs lie in `configs/` and are installed as `frozen_vision/configs`, where the command line finds them.
"""

import setuptools

setuptools.setup(
  packages=[*setuptools.find_packages(include=["frozen_vision", "frozen_vision.*"]), "frozen_vision.configs"],
  package_dir={"frozen_vision.configs": "configs"},
)
