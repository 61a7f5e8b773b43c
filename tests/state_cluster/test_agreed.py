from tests.redis.test_agreed import *  # noqa: F403
