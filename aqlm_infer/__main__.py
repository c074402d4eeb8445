"""``python -m aqlm_infer`` is the command ``aqlm-infer``."""

from .cli.app import main

if __name__ == "__main__":
    main()
