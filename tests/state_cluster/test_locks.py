from tests.redis.test_locks import *  # noqa: F403
