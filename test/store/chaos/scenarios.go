package chaos

import (
	"time"

	"skein.io/skein/test/store/chaos/history"
)

// scenarios by name. Together they have every fault, with three and five nodes.
var scenarios = map[string]scenario{
	"crash":     {members: 3, faults: []string{"kill-leader", "kill-follower", "kill-some", "kill-all", "transfer"}},
	"crash-5":   {members: 5, faults: []string{"kill-leader", "kill-some", "kill-all", "transfer", "isolate-leader"}},
	"pause":     {members: 3, faults: []string{"pause-leader", "pause-some", "blink", "kill-follower"}},
	"network":   {members: 3, faults: []string{"isolate-leader", "isolate-follower", "partition", "mute", "deaf", "bridge", "flap"}},
	"network-5": {members: 5, faults: []string{"isolate-leader", "partition", "mute", "deaf", "bridge", "flap", "kill-leader"}},
	"clock":     {members: 3, faults: []string{"clock", "kill-leader", "pause-leader"}, edit: func(t *traffic) { t.leases = 3 }},
	// Large values, so that files have to grow.
	"full": {members: 3, faults: []string{"full-leader", "full-some", "kill-leader"}, edit: func(t *traffic) { t.padding = 60_000 }},
	// The quota is reached again and again, and left when the past is compacted.
	"quota": {members: 3, faults: []string{"kill-leader", "isolate-leader", "transfer", "power-some"}, args: []string{"-quota", "16777216"},
		edit: func(t *traffic) {
			t.padding, t.padAll, t.compact, t.defrag = 500_000, true, 4*time.Second, 2*time.Second
		}},
	"backup":   {members: 3, faults: []string{"backup", "transfer", "kill-leader", "pause-leader"}},
	"slow":     {members: 3, faults: []string{"slow-leader", "slow-some", "kill-leader"}},
	"power":    {members: 3, faults: []string{"power-leader", "power-some", "power-all"}},
	"power-5":  {members: 5, faults: []string{"power-leader", "power-some", "power-all", "isolate-leader"}},
	"bad-disk": {members: 3, faults: []string{"bad-sync", "power-leader", "full-leader", "slow-some"}},
	// A log so short that who was away gets a snapshot.
	"behind": {members: 3, faults: []string{"behind", "kill-leader", "power-some", "isolate-follower"}, args: []string{"-snapshot-entries", "150"},
		edit: func(t *traffic) { t.slow = 1 }},
	"members": {members: 3, spares: 1, faults: []string{"replace", "kill-follower", "isolate-leader", "transfer", "power-some"}, args: []string{"-snapshot-entries", "400"}},
	// Compaction and defragmentation all the time, under crashes.
	"space": {members: 3, faults: []string{"kill-leader", "power-some", "kill-all", "isolate-follower"}, args: []string{"-snapshot-entries", "500"},
		edit: func(t *traffic) {
			t.compact, t.defrag, t.snapshots = 150*time.Millisecond, 300*time.Millisecond, true
		}},
	// Watches that read slowly, of much.
	"starved": {members: 3, faults: []string{"pause-some", "isolate-follower", "transfer"},
		edit: func(t *traffic) { t.roamers, t.slow, t.padding, t.pause = 5, 4, 30_000, 3*time.Millisecond }},
	"single": {members: 1, faults: []string{"kill-all", "power-all", "blink"}},
	"all":    {members: 3, spares: 1, faults: faultNames(), args: []string{"-snapshot-entries", "300"}, edit: everything},
	"all-5":  {members: 5, spares: 1, faults: faultNames(), args: []string{"-snapshot-entries", "300"}, edit: everything},
}

func everything(t *traffic) {
	t.leases, t.roamers, t.slow, t.defrag, t.snapshots = 2, 3, 1, 2*time.Second, true
}

// named gives a scenario with its traffic.
func named(name string, length time.Duration) scenario {
	sc := scenarios[name]
	sc.traffic, sc.length = defaultTraffic(), length
	if sc.edit != nil {
		sc.edit(&sc.traffic)
	}
	return sc
}

// broken promises of the process under test, with the classes of which at least
// one has to be found.
var broken = map[string]struct {
	faults []string
	found  []history.Class
}{
	"stale-read":      {[]string{"isolate-leader", "isolate-follower"}, []history.Class{history.StaleRead}},
	"lost-write":      {[]string{"transfer"}, []history.Class{history.LostWrite, history.LogGap}},
	"double-apply":    {[]string{"transfer"}, []history.Class{history.DoubleApply}},
	"early-lease":     {[]string{"transfer"}, []history.Class{history.LeaseEarly}},
	"watch-drop":      {[]string{"transfer"}, []history.Class{history.WatchGap, history.WatchProgress}},
	"watch-duplicate": {[]string{"transfer"}, []history.Class{history.WatchDouble}},
}
