"""The command line. One file per command; none imports torch before it has checked what it was given."""
