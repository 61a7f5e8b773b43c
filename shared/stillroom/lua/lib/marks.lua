-- Drops marks that are older than any entry can be, the oldest first, and remembers up to where (`!`): an entry stamped
-- before that is dead without a mark. The members that describe the epoch itself stay.
local STAYS = {['!'] = true, ['*'] = true, ['@'] = true, ['#'] = true, ['&'] = true}
local STAYING = 6 -- these and `~<epoch>`; some are always the oldest

-- Returns how many were dropped. `age_us`: the longest life of an entry and of the load before it.
local function drop_old_marks(epoch, newest, marks, globs, age_us, most)
  -- A cache that is full evicts first what nobody has asked for. No reader but one that begins asks for the globs, and
  -- the first pattern after their loss begins a new epoch (see mark), in which nothing older lives. So they are asked
  -- for here, each minute. By pcall: a stranger's key in their place must not keep tags from being invalidated.
  redis.pcall('ZCARD', globs)
  local bound = plain(math.min(now_us() - age_us, newest))
  local old = redis.call('ZRANGE', marks, '-inf', '(' .. bound, 'BYSCORE', 'LIMIT', 0, most + STAYING, 'WITHSCORES')
  local dropped, youngest = 0, nil
  for i = 1, #old, 2 do
    if not STAYS[old[i]] and old[i] ~= '~' .. epoch then
      dropped = dropped + redis.call('ZREM', marks, old[i])
      youngest = old[i + 1]
    end
  end
  if youngest then
    -- Not the bound: after a quiet time the youngest entries are stamped before it, and no mark that is gone
    -- could have named them.
    redis.call('ZADD', marks, 'GT', youngest, '!')
    redis.call('ZREMRANGEBYSCORE', globs, '-inf', youngest)
  end
  return dropped
end
