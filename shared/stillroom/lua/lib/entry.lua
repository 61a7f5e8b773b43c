-- Writes an entry: what the server's clocks decide in front, then the caller's part (cache/entry.py).

local function write_entry(key, epoch, stamp, body, ttl_ms, life_ms)
  local fresh_until = plain(math.floor(now_us() / 1000) + ttl_ms)
  local value = table.concat({'1', epoch, stamp, fresh_until, body}, '\t')
  redis.call('SET', key, value, 'PX', life_ms)
end
