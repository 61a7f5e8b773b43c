from tests.redis.test_session_bounds import *  # noqa: F403
