from tests.redis.test_events import *  # noqa: F403
