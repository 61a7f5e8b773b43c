-- Returns a page of the living sessions of a user in this shard, without their data, the newest first. It forgets the
-- sessions whose record is gone.
-- KEYS  1 user index
-- ARGV  1 prefix  2 the stamp to go on below: `+inf`, then `(` and the stamp that the page before returned
--       3 most sessions on a page
-- returns {the stamp to go on below, '' if there are no more, h, the record's own fields, h …}
-- include: time session

-- PARTS, and the rest of OWN
local FIELDS = {'_u', '_s', '_l', '_x', '_i', '_t', '_to', '_until', '_grace', '_c', '_v', '_m', '_a'}
local prefix, now, found, gone = ARGV[1], now_us(), {''}, {}
local page = redis.call('ZRANGE', KEYS[1], ARGV[2], '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, ARGV[3], 'WITHSCORES')
for i = 1, #page, 2 do
  local h = page[i]
  local key = prefix .. 's:' .. h
  local f = redis.pcall('HMGET', key, unpack(FIELDS))
  local session = parsed(h, key, f)
  if not session then
    gone[#gone + 1] = h
  elseif not session.to and lives(prefix, session, now) then
    found[#found + 1] = h
    found[#found + 1] = table.concat(
      {f[1], f[10] or '', f[3], f[4], f[5], f[11] or '', f[13] or '', f[6], f[12] or ''}, '\t') -- as OWN has them
  end
end
if #gone > 0 then
  redis.pcall('ZREM', KEYS[1], unpack(gone)) -- the others are listed also where nothing can be written
end
if #page == 2 * tonumber(ARGV[3]) then
  found[1] = page[#page]
end
return found
