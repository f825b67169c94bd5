-- FILL: a reader stores what it loaded, if nothing has invalidated the key since its lease was granted.
-- KEYS: value, guard, stale copy, "has stale copies".
-- ARGV: lease, value, time to live in ms, version or '', time to live of the stale copy in ms or ''.
-- Returns 1 if stored, 0 if refused.

if redis.pcall('GET', KEYS[2]) ~= 'L' .. ARGV[1] then return 0 end

redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if ARGV[4] == '' then
    redis.call('UNLINK', KEYS[2])
else
    redis.call('SET', KEYS[2], 'V' .. ARGV[4], 'PX', ARGV[3])
end
if ARGV[5] ~= '' then
    -- In this order a delete that could meet the copy always knows that there are copies.
    redis.call('SET', KEYS[4], '1')
    redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[5])
end
return 1
