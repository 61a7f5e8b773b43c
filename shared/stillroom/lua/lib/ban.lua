-- Writes bans. A ban is a string that tells its reason, and its TTL is how long it lasts: a check of limits need only
-- see that the key is there.

local INDEX_MS = 31 * 86400000 -- no ban is longer

-- Adds a ban to the index (subject → until), from which bans are listed. Each addition drops the bans that have ended.
local function write_ban(key, index, subject, now, ms, about)
  redis.call('ZREMRANGEBYSCORE', index, '-inf', plain(now))
  about.since, about['until'] = now / 1000, (now + ms) / 1000
  redis.call('SET', key, cjson.encode(about), 'PX', plain(ms))
  redis.call('ZADD', index, plain(now + ms), subject)
  redis.call('PEXPIRE', index, plain(INDEX_MS))
end

-- Adds a width to those of networks that have bans, with the time they end, ms: '4/24 1700000000000,6/40 …'. A process
-- has to know the widths to look for those bans. Returns false if there are too many widths.
local function note_width(key, width, now, ms, most)
  local untils, names, last = {[width] = now + ms}, {width}, now + ms
  for name, till in string.gmatch(redis.call('GET', key) or '', '(%d/%d+) (%d+)') do
    till = tonumber(till)
    if name == width then
      untils[name] = math.max(untils[name], till)
    elseif till > now then
      untils[name] = till
      names[#names + 1] = name
    end
    last = math.max(last, till)
  end
  if #names > most then
    return false
  end
  table.sort(names)
  for i, name in ipairs(names) do
    names[i] = name .. ' ' .. plain(untils[name])
  end
  redis.call('SET', key, table.concat(names, ','), 'PX', plain(last - now))
  return true
end
