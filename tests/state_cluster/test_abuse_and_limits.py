from tests.redis.test_abuse_and_limits import *  # noqa: F403
