package api

import (
	"context"
	"os"
	"path/filepath"
	"time"

	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"

	"skein.io/skein/consensus/host"
)

// inMemory is a file system whose writes do not wait for the disk, which others use as well.
const inMemory = "/dev/shm"

// startOwn puts the fixture on Skein's own store: what takes time is measured with what belongs to it, and without the garbage of an etcd in the same process.
func (f *fixture) startOwn(dir string) error {
	if _, err := os.Stat(inMemory); err == nil {
		if dir, err = os.MkdirTemp(inMemory, "api-test"); err != nil {
			return err
		}
	}
	h, err := host.New(host.Config{NodeName: "n1", Dir: filepath.Join(dir, "store"), ListenAddr: "127.0.0.1:0", Resolve: func(string) (string, bool) { return "", false }})
	if err != nil {
		return err
	}
	f.closeStore = func() { _ = h.Close(context.Background()); _ = os.RemoveAll(dir) }
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := h.Bootstrap(ctx); err != nil {
		return err
	}
	for _, s := range h.Shards().Shards() {
		for !h.Ready(s.Name) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	f.storeOf = func(key string) *etcdclient.Client {
		c, _ := h.Client(h.Shards().ForKey(key).Name)
		return c
	}
	f.store = f.storeOf("/")
	return nil
}
