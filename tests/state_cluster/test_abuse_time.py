from tests.redis.test_abuse_time import *  # noqa: F403
