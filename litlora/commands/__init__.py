"""One file per subcommand: the file name is the command name is the function name."""
