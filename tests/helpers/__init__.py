"""Things that several test files use: models, data, runs, and stand-ins for servers."""
