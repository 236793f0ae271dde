"""The command line: from a file with counts to tables, figures and a page that sums them up."""
