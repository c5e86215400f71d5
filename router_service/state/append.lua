-- Append a writer's entries to their streams and settle what they used: each entry exactly once.
-- KEYS[1] is the writer's mark: the number of its last entry that is here. ARGV[1] is the number before the first entry
-- sent, ARGV[2] the mark's time to live in seconds; then, for each entry: number, stream, most entries kept (0: all),
-- payload, count of charges, and for each charge: counter, kind, change, time to live.
-- Returns the mark. If it is below ARGV[1], Redis has lost entries that it had taken, and nothing was appended.
local mark = tonumber(redis.call('GET', KEYS[1]) or '0')
if mark < tonumber(ARGV[1]) then return mark end

local function settle(key, kind, change, ttl)
  if kind == 'budget' then
    redis.call('HINCRBYFLOAT', key, 'n', change)
    redis.call('EXPIRE', key, ttl)
  elseif redis.call('EXISTS', key) == 1 then  -- a bucket that has expired is full
    redis.call('HINCRBYFLOAT', key, 'n', change)
  end
end

local at, taken = 3, false
while at <= #ARGV do
  local number, stream, kept, payload, charges = tonumber(ARGV[at]), ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], tonumber(ARGV[at + 4])
  at = at + 5
  if number > mark then
    if kept == '0' then
      redis.call('XADD', stream, '*', 'entry', payload)
    else
      redis.call('XADD', stream, 'MAXLEN', '~', kept, '*', 'entry', payload)
    end
    for charge = at, at + 4 * (charges - 1), 4 do
      settle(ARGV[charge], ARGV[charge + 1], ARGV[charge + 2], ARGV[charge + 3])
    end
    mark, taken = number, true
  end
  at = at + 4 * charges
end
if taken then redis.call('SET', KEYS[1], string.format('%d', mark), 'EX', ARGV[2]) end
return mark
