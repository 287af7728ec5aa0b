package membership

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"skein.io/skein/gossip/health"
)

func TestFake(t *testing.T) {
	now := time.Unix(1000, 0)
	f := NewFake(Member{Name: "n1", Addr: netip.MustParseAddr("10.0.0.1")}, func() time.Time { return now })
	changes, cancel := f.Subscribe()
	told := func() bool {
		select {
		case <-changes:
			return true
		default:
			return false
		}
	}
	if !told() || told() {
		t.Error("a new subscriber is told once")
	}
	f.Set(Member{Name: "n2", Tags: map[string]string{TagZone: "a"}})
	f.Set(Member{Name: "n2", Tags: map[string]string{TagZone: "b"}})
	if !told() || told() {
		t.Error("two changes are told once")
	}
	now = now.Add(time.Second)
	f.SetVerdict("n2", health.Dead)
	m, ok := f.Member("n2")
	if !ok || m.Verdict != health.Dead || !m.Since.Equal(now) || m.Tags[TagZone] != "b" || m.Self {
		t.Errorf("n2 is %+v", m)
	}
	now = now.Add(time.Second)
	if err := f.SetTags(map[string]string{TagRole: "leader"}); err != nil {
		t.Fatal(err)
	}
	if err := f.SetTags(map[string]string{"x": strings.Repeat("x", 600)}); err == nil {
		t.Error("too long tags were taken")
	}
	own, _ := f.Member("n1")
	if !own.Self || f.Tags()[TagRole] != "leader" || !own.Since.Equal(time.Unix(1000, 0)) {
		t.Errorf("n1 is %+v", own)
	}
	if v := f.Verdicts(); len(v) != 2 || v["n1"] != health.Alive || v["n2"] != health.Dead {
		t.Errorf("verdicts %v", v)
	}
	f.SetRTT("n2", time.Millisecond)
	if rtt, ok := f.RTT("n2"); rtt != time.Millisecond || !ok {
		t.Errorf("RTT %v %t", rtt, ok)
	}
	if n, err := f.Join([]string{"a", "b"}); n != 2 || err != nil || len(f.Joined()) != 2 {
		t.Errorf("Join = %d, %v", n, err)
	}
	if err := f.Forget("n2"); err != nil || len(f.Members()) != 1 {
		t.Errorf("after Forget: %v, %v", f.Members(), err)
	}
	told()
	cancel()
	if err := f.Leave(context.Background()); err != nil || told() {
		t.Errorf("Leave: %v; or a cancelled subscriber was told", err)
	}
	f.Shutdown()
	f.End(ErrNameTaken) // too late
	<-f.Done()
	if !errors.Is(f.Err(), ErrStopped) {
		t.Errorf("Err = %v", f.Err())
	}
}
