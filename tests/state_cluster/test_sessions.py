from tests.redis.test_sessions import *  # noqa: F403
