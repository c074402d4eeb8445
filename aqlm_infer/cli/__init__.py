"""The command ``aqlm-infer``: one file a verb, each a thin layer over a Python function."""
