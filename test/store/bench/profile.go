package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// profiles go into a directory: of the CPU of each of Skein's processes while a cell runs, and of
// their memory after the writes. The numbers of a cell that is profiled are a little worse.
type profiles struct{ dir string }

// during takes profiles of the CPU from a time on; what it returns waits for them.
func (p profiles) during(ctx context.Context, c *cluster, name string, from time.Time, d time.Duration) func() error {
	if p.dir == "" || len(c.admin) == 0 {
		return func() error { return nil }
	}
	var wg sync.WaitGroup
	errs := make([]error, len(c.admin))
	for i := range c.admin {
		wg.Go(func() {
			if errs[i] = rest(ctx, time.Until(from)); errs[i] == nil {
				errs[i] = p.fetch(ctx, c, i, fmt.Sprintf("profile?seconds=%d", max(1, int(d.Seconds()))), name)
			}
		})
	}
	return func() error { wg.Wait(); return errors.Join(errs...) }
}

// memory takes what the processes hold, and have allocated.
func (p profiles) memory(ctx context.Context, cs []*cluster, name string) (err error) {
	for _, c := range cs {
		for i := range c.admin {
			if p.dir != "" {
				err = errors.Join(err, p.fetch(ctx, c, i, "heap", c.name+"-"+name), p.fetch(ctx, c, i, "goroutine?debug=1", c.name+"-goroutines"))
			}
		}
	}
	return err
}

func (p profiles) fetch(ctx context.Context, c *cluster, i int, what, name string) (err error) {
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.admin[i]+"/pprof/"+what, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("profile of n%d: %w", i, err)
	}
	defer resp.Body.Close()
	f, err := os.Create(filepath.Join(p.dir, fmt.Sprintf("%s-n%d.pprof", name, i)))
	if err != nil {
		return err
	}
	_, err = f.ReadFrom(resp.Body)
	return errors.Join(err, f.Close())
}
