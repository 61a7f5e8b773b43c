from tests.redis.test_images import *  # noqa: F403
