from tests.redis.test_session_rings import *  # noqa: F403
