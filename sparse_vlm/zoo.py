"""`python -m sparse_vlm.zoo`: maintain the model zoo of this checkout."""

import sys

from sparse_vlm.hub.zoo import main

if __name__ == "__main__":
    sys.exit(main())
