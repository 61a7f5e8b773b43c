from tests.redis.test_abuse_exempt import *  # noqa: F403
