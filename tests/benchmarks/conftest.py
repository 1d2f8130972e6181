"""These tests run only with the packages of an extra."""

from helpers.extras import HF, left_out

collect_ignore_glob = left_out((*HF, "pandas", "matplotlib"))
