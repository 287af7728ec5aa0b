package host

import (
	"testing"
	"time"
)

// The verdict needs time in both directions, and single bad writes change nothing.
func TestDiskJudge(t *testing.T) {
	const ms = time.Millisecond
	now := time.Unix(0, 0)
	var rules DiskRules
	rules.setDefaults()
	j := diskJudge{rules: rules}
	feed := func(d time.Duration, took ...time.Duration) {
		for end := now.Add(d); now.Before(end); now = now.Add(j.pauseOr()) {
			for _, x := range took {
				j.observe(now, x)
			}
		}
	}
	want := func(what string, slow bool) {
		t.Helper()
		if j.slow != slow {
			t.Fatalf("%s: slow is %v; p90 %v of %v", what, j.slow, j.p90(), j.last)
		}
	}
	feed(5*time.Second, 900*ms)
	want("too few probes", false)
	j = diskJudge{rules: rules}
	feed(10*time.Minute, 3*ms)
	want("a fast disk", false)
	if p := j.pause(); p != rules.Interval {
		t.Errorf("at rest probed every %v", p)
	}
	j.observe(now, time.Second)
	j.observe(now, time.Second)
	if p := j.pause(); p != rules.Interval/10 {
		t.Errorf("after a bad probe the next comes in %v", p)
	}
	feed(10*time.Minute, 3*ms, 3*ms, 3*ms, 3*ms, 3*ms, 3*ms, 3*ms, 3*ms, 3*ms, 3*ms, 3*ms, 300*ms)
	want("one bad write of twelve", false)
	began := now
	for !j.slow && now.Sub(began) < time.Hour {
		feed(time.Second, 250*ms)
	}
	if took := now.Sub(began); took < rules.SlowFor || took > 3*rules.SlowFor {
		t.Errorf("a slow disk was noticed after %v", took)
	}
	feed(5*time.Minute, 150*ms)
	want("better, but not good", true)
	feed(9*time.Minute, 5*ms)
	want("not for long enough", true)
	feed(time.Minute, 150*ms)
	feed(9*time.Minute, 5*ms)
	want("a relapse begins anew", true)
	feed(3*time.Minute, 5*ms)
	want("good for long", false)
}

func (j *diskJudge) pauseOr() time.Duration {
	if len(j.last) < diskRecent {
		return j.rules.Interval / 10
	}
	return j.pause()
}
