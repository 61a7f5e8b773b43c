-- Keeps the work that follows from invalidations, by due time in ms: `t:<tag>` reclaim the entries that the tag killed,
-- `s:<tag>` refresh those it made stale, `sweep` reclaim the dead of the whole keyspace. It decides nothing that a
-- reader sees.
-- Without workers it must not grow for ever: past the limit one sweep stands for all tags.

local TODO_LIMIT = 10000

local function promise(todo, members, keep_ms)
  local now = plain(math.floor(now_us() / 1000))
  if redis.call('ZCARD', todo) + #members > TODO_LIMIT then
    redis.call('UNLINK', todo)
    members = {'sweep'}
  end
  for _, member in ipairs(members) do
    redis.call('ZADD', todo, now, member)
  end
  redis.call('PEXPIRE', todo, keep_ms) -- by then every entry that the work is about is gone
end
