"""What ``report.py`` is made of: rows of the results, tables and plots from them."""
