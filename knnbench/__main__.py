"""``python -m knnbench``."""

from knnbench.cli import main

if __name__ == "__main__":
    main()
