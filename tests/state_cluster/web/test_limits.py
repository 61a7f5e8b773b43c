from tests.web.test_limits import *  # noqa: F403
