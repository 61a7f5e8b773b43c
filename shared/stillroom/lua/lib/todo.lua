-- Work that follows from invalidations, by due time in ms: `t:<tag>` reclaim what it killed, `s:<tag>` refresh what
-- it made stale, `sweep` reclaim whatever is dead in the whole keyspace. It decides nothing that a reader sees.
-- Without workers it must not grow for ever: past the limit one sweep stands for all tags.

local TODO_LIMIT = 10000

local function promise(todo, members, keep_ms)
  local now = plain(math.floor(now_us() / 1000))
  if redis.call('ZCARD', todo) + #members > TODO_LIMIT then
    redis.call('DEL', todo)
    members = {'sweep'}
  end
  for _, member in ipairs(members) do
    redis.call('ZADD', todo, now, member)
  end
  redis.call('PEXPIRE', todo, keep_ms) -- by then every entry it could be about is gone
end
