"""For VERL_USE_EXTERNAL_MODULES: importing this module installs UNA in verl."""

from una_fast.integrations.verl import install

install()
