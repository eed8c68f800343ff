"""`python -m jaxrl_post` is the command `jaxrl-post`."""

import sys

from jaxrl_post.cli.main import main

sys.exit(main())
