from tests.redis.test_bulk import *  # noqa: F403
