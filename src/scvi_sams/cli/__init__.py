"""The command line: from a file with counts to tables, figures and a summary page."""
