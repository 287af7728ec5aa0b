package members_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
	"skein.io/skein/consensus/space"
)

// A voter's data is changed under it: it is found, and made anew from the others, under
// another replica ID, while the cluster is written to.
func TestCorruptReplicaIsMadeAnew(t *testing.T) {
	f := newFleetOf(t, 3, func(cfg *host.Config) {
		cfg.Space = space.Config{Retention: 2 * time.Second, CheckInterval: 200 * time.Millisecond}
	})
	f.grow(3)
	m := f.wait(0, "012/")
	victim := (f.c.Leader() + 1) % 3
	via := (victim + 1) % 3
	var old uint64
	for id, node := range m.Voters {
		if node == f.c.Nodes[victim].ID {
			old = id
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if _, err := f.c.Nodes[via].Client().Put(ctx, "/skein/k", "unmistakable"); err != nil {
		t.Fatal(err)
	}
	reads := func() (string, error) {
		r, err := f.c.Nodes[victim].Client().KV.Get(ctx, "/skein/k", clientv3.WithSerializable())
		if err != nil || len(r.Kvs) != 1 {
			return "", errors.Join(err, errors.New("it is not there"))
		}
		return string(r.Kvs[0].Value), nil
	}
	f.c.Until("the victim has it", func() error { _, err := reads(); return err })
	f.stops[victim]()
	f.c.Nodes[victim].Stop()
	storetest.Spoil(t, filepath.Join(f.c.Nodes[victim].Config().Dir, fmt.Sprintf("shard-1-replica-%d", old)), "unmistakable")
	f.revive(victim)
	w := f.write()
	start := time.Now()
	f.c.Until("another replica on the node", func() error {
		got, m, err := f.shape(via)
		if err != nil {
			return err
		}
		for id, node := range m.Voters {
			if node == f.c.Nodes[victim].ID && id > old && got == "012/" {
				return nil
			}
		}
		return fmt.Errorf("it is %s, %+v; %+v", got, m.Voters, f.mgr[f.c.Leader()].Decisions())
	})
	f.ready(victim)
	t.Logf("made anew after %v", time.Since(start).Round(time.Millisecond))
	w.stop(victim)
	if v, err := reads(); err != nil || v != "unmistakable" {
		t.Errorf("it reads %q, %v", v, err)
	}
	f.c.Until("the end of the alarm", func() error {
		for _, s := range f.c.Nodes[victim].Host().Status() {
			if len(s.Alarms) > 0 || !s.Ready {
				return fmt.Errorf("%+v", s)
			}
		}
		return nil
	})
}
