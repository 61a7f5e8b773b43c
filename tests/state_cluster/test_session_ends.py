from tests.redis.test_session_ends import *  # noqa: F403
