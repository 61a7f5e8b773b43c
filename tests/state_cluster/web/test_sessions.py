from tests.web.test_sessions import *  # noqa: F403
