from tests.redis.test_cache import *  # noqa: F403
