"""From a command line and its YAML files to the arguments of a command; no checks that need more than the flags."""
