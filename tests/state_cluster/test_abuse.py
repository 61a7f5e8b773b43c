from tests.redis.test_abuse import *  # noqa: F403
