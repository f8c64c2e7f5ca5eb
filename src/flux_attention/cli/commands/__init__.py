"""The commands, one a file. Heavy imports wait inside the functions, so that `--help` answers at once."""
