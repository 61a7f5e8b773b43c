-- Writes an entry: first the part that the server's clocks decide, then the caller's part (cache/entry.py). KEYS from
-- `first` on are the indexes of its tags, where workers look for it once a tag is invalidated. They save memory
-- and decide nothing, so an index that can't be written does not matter. Each write drops members that have run out.

local TRIMMED_PER_WRITE = '2' -- text: to make it of a number costs as much as half a command

local function write_entry(key, epoch, stamp, body, ttl_ms, life_ms, name, first)
  local now_ms = math.floor(now_us() / 1000)
  local by_now, life, expires = plain(now_ms), plain(life_ms), plain(now_ms + life_ms)
  local value = table.concat({'1', epoch, stamp, plain(now_ms + ttl_ms), body}, '\t')
  redis.call('SET', key, value, 'PX', life)
  for i = first, #KEYS do
    local written = redis.pcall('ZADD', KEYS[i], expires, name)
    if type(written) == 'number' then
      local gone = redis.call('ZRANGEBYSCORE', KEYS[i], '-inf', by_now, 'LIMIT', '0', TRIMMED_PER_WRITE)
      if #gone > 0 then
        redis.call('ZREM', KEYS[i], unpack(gone))
      end
      if redis.call('PTTL', KEYS[i]) < life_ms then
        redis.call('PEXPIRE', KEYS[i], life)
      end
    end
  end
end
