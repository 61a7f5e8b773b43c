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

-- Returns the widths of networks that have bans, and until when, ms.
local function widths_in(key, now)
  local untils, count = {}, 0
  for width, till in string.gmatch(redis.call('GET', key) or '', '(%d/%d+) (%d+)') do
    if tonumber(till) > now then
      untils[width], count = tonumber(till), count + 1
    end
  end
  return untils, count
end

-- Writes them as processes read them: '4/24 1700000000000,6/40 …'.
local function write_widths(key, untils, now)
  local said, last = {}, now
  for width, till in pairs(untils) do
    said[#said + 1] = width .. ' ' .. plain(till)
    last = math.max(last, till)
  end
  if #said == 0 then
    redis.call('DEL', key)
    return
  end
  table.sort(said)
  redis.call('SET', key, table.concat(said, ','), 'PX', plain(last - now))
end

-- Adds a width to those of networks that have bans. A process has to know the widths to look for those bans. Returns
-- false if there are too many widths.
local function note_width(key, width, now, ms, most)
  local untils, count = widths_in(key, now)
  if not untils[width] and count >= most then
    return false
  end
  untils[width] = math.max(untils[width] or 0, now + ms)
  write_widths(key, untils, now)
  return true
end

-- Takes the width of a lifted ban from those of networks that have bans, unless other bans in the index have it.
local function forget_width(key, index, width, now)
  local untils = widths_in(key, now)
  if not untils[width] then
    return
  end
  untils[width] = nil
  local bans = redis.call('ZRANGEBYSCORE', index, '(' .. plain(now), '+inf', 'WITHSCORES')
  for i = 1, #bans, 2 do
    local bits = string.match(bans[i], '/(%d+)$')
    if bits and (string.find(bans[i], ':', 1, true) and '6/' or '4/') .. bits == width then
      untils[width] = math.max(untils[width] or 0, tonumber(bans[i + 1]))
    end
  end
  write_widths(key, untils, now)
end
