from tests.redis.test_limits import *  # noqa: F403
