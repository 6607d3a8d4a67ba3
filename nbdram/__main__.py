import sys

from nbdram.cli import main

if __name__ == "__main__":
    sys.exit(main())
