package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/desired"
)

const (
	// collectPeriod is how often dead containers, orphans, logs and images are looked after.
	collectPeriod = time.Minute
	// orphanGrace keeps young leftovers: their pod may just be starting.
	orphanGrace = time.Minute
)

// collect removes what no pod needs any more until ctx ends.
func (a *Agent) collect(ctx context.Context) {
	tick := time.NewTicker(collectPeriod)
	defer tick.Stop()
	for {
		for what, f := range map[string]func(context.Context) error{"containers": a.collectContainers, "orphans": a.collectOrphans, "logs": a.rotateLogs, "images": a.collectImages} {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				a.cfg.Logger.Warn("clean-up failed, tried again", "what", what, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// collectContainers keeps the newest dead container of each name (its log is "previous") and the newest sandbox.
func (a *Agent) collectContainers(ctx context.Context) error {
	containers, err := a.cfg.Runtime.ListContainers(ctx, nil)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	inSandbox := map[string]int{}
	groups := map[string][]*runtimeapi.Container{}
	for _, c := range containers {
		inSandbox[c.PodSandboxId]++
		if c.Labels[labelPodUID] != "" && c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			k := c.Labels[labelPodUID] + "/" + c.Labels[labelContainer]
			groups[k] = append(groups[k], c)
		}
	}
	for _, g := range groups {
		sort.Slice(g, func(i, j int) bool { return g[i].CreatedAt > g[j].CreatedAt })
		for _, c := range g[1:] {
			if err := a.cfg.Runtime.RemoveContainer(ctx, c.Id); err != nil && !isNotFound(err) {
				return fmt.Errorf("remove container %s: %w", c.Id, err)
			}
			inSandbox[c.PodSandboxId]--
			a.removeLog(c)
		}
	}
	sandboxes, err := a.cfg.Runtime.ListPodSandbox(ctx, nil)
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	newest := map[string]*runtimeapi.PodSandbox{}
	for _, s := range sandboxes {
		uid := s.Labels[labelPodUID]
		if n := newest[uid]; n == nil || s.CreatedAt > n.CreatedAt {
			newest[uid] = s
		}
	}
	for _, s := range sandboxes {
		uid := s.Labels[labelPodUID]
		if uid == "" || s.State == runtimeapi.PodSandboxState_SANDBOX_READY || newest[uid] == s || inSandbox[s.Id] > 0 {
			continue
		}
		if err := a.cfg.Runtime.RemovePodSandbox(ctx, s.Id); err != nil && !isNotFound(err) {
			return fmt.Errorf("remove sandbox %s: %w", s.Id, err)
		}
	}
	return nil
}

func (a *Agent) removeLog(c *runtimeapi.Container) {
	dir := filepath.Join(a.cfg.StateDir, "logs", "pods", fmt.Sprintf("%s_%s_%s", c.Labels[labelPodNamespace], c.Labels[labelPodName], c.Labels[labelPodUID]), c.Labels[labelContainer])
	files, err := filepath.Glob(filepath.Join(dir, c.Annotations[annRestartCount]+".log*"))
	if err != nil {
		return
	}
	for _, f := range files {
		_ = os.Remove(f) // what stays goes with the pod
	}
}

// collectOrphans removes directories and cgroups of pods that nobody knows any more: a daemon died while it cleaned up.
func (a *Agent) collectOrphans(ctx context.Context) error {
	if !a.cfg.Desired.Synced(desired.Pods) {
		return nil
	}
	sandboxes, err := a.cfg.Runtime.ListPodSandbox(ctx, nil)
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	known := map[types.UID]bool{}
	for _, s := range sandboxes {
		known[types.UID(s.Labels[labelPodUID])] = true
	}
	for _, p := range a.cfg.Desired.Pods() {
		known[p.UID] = true
	}
	for _, r := range a.cfg.Desired.Records() {
		known[r.UID] = true
	}
	unknown := func(uid types.UID) bool { return !known[uid] && a.worker(uid) == nil }
	uids, err := a.volumes.Pods()
	if err != nil {
		return err
	}
	for _, uid := range uids {
		if info, err := os.Stat(a.volumes.PodDir(uid)); err != nil || time.Since(info.ModTime()) < orphanGrace || !unknown(uid) {
			continue
		}
		a.cfg.Logger.Info("volumes of a pod that is gone: removed", "uid", uid)
		if err := a.volumes.Teardown(uid); err != nil {
			return err
		}
	}
	names, err := a.cgroups.List()
	if err != nil {
		return err
	}
	for _, n := range names {
		if unknown(types.UID(n)) && a.volumesGone(types.UID(n)) {
			if err := a.cgroups.Remove(n); err != nil {
				return err
			}
		}
	}
	return a.orphanLogs(unknown)
}

// volumesGone says whether a pod has no directory: then its cgroup is not one that is just being made.
func (a *Agent) volumesGone(uid types.UID) bool {
	_, err := os.Stat(a.volumes.PodDir(uid))
	return os.IsNotExist(err)
}

func (a *Agent) orphanLogs(unknown func(types.UID) bool) error {
	dir := filepath.Join(a.cfg.StateDir, "logs", "pods")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list logs: %w", err)
	}
	for _, e := range entries {
		i := strings.LastIndexByte(e.Name(), '_')
		info, err := e.Info()
		if i < 0 || err != nil || time.Since(info.ModTime()) < orphanGrace || !unknown(types.UID(e.Name()[i+1:])) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// rotateLogs moves full logs of running containers aside and removes the oldest. The runtime opens a new file.
func (a *Agent) rotateLogs(ctx context.Context) error {
	containers, err := a.cfg.Runtime.ListContainers(ctx, &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}})
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, c := range containers {
		if c.Labels[labelPodUID] == "" {
			continue
		}
		log := filepath.Join(a.cfg.StateDir, "logs", "pods", fmt.Sprintf("%s_%s_%s", c.Labels[labelPodNamespace], c.Labels[labelPodName], c.Labels[labelPodUID]),
			c.Labels[labelContainer], c.Annotations[annRestartCount]+".log")
		info, err := os.Stat(log)
		if err != nil || info.Size() < a.cfg.LogMaxBytes {
			continue
		}
		if err := a.rotateLog(ctx, c.Id, log); err != nil {
			return err
		}
	}
	return nil
}

func (a *Agent) rotateLog(ctx context.Context, id, log string) error {
	old, err := filepath.Glob(log + ".*")
	if err != nil {
		return err
	}
	sort.Strings(old)
	for len(old) > 0 && len(old) >= a.cfg.LogMaxFiles-1 {
		if err := os.Remove(old[0]); err != nil {
			return err
		}
		old = old[1:]
	}
	aside := log + "." + time.Now().UTC().Format("20060102-150405")
	if err := os.Rename(log, aside); err != nil {
		return err
	}
	if err := a.cfg.Runtime.ReopenContainerLog(ctx, id); err != nil {
		// The container still writes to the file that was moved: put it back.
		if rerr := os.Rename(aside, log); rerr != nil {
			return fmt.Errorf("reopen log of container %s: %w; %w", id, err, rerr)
		}
		return fmt.Errorf("reopen log of container %s: %w", id, err)
	}
	return nil
}

// collectImages removes unused images, the largest first, when their disk is too full. Pinned images stay.
func (a *Agent) collectImages(ctx context.Context) error {
	info, err := a.cfg.Images.ImageFsInfo(ctx)
	if err != nil {
		return fmt.Errorf("image filesystem: %w", err)
	}
	if len(info.GetImageFilesystems()) == 0 {
		return nil
	}
	var st unix.Statfs_t
	dir := info.ImageFilesystems[0].GetFsId().GetMountpoint()
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("image filesystem %s: %w", dir, err)
	}
	total, free := int64(st.Blocks)*st.Bsize, int64(st.Bavail)*st.Bsize //nolint:unconvert // differs by architecture
	if total == 0 || (total-free)*100/total < int64(a.cfg.ImageGCHigh) {
		return nil
	}
	target := (total - free) - total*int64(a.cfg.ImageGCLow)/100
	images, err := a.cfg.Images.ListImages(ctx, nil)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	containers, err := a.cfg.Runtime.ListContainers(ctx, nil)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	used := map[string]bool{}
	for _, c := range containers {
		used[c.GetImage().GetImage()], used[c.ImageRef], used[c.ImageId] = true, true, true
	}
	for _, p := range a.cfg.Desired.Pods() {
		for i := range p.Spec.Volumes {
			if v := p.Spec.Volumes[i].Image; v != nil {
				used[v.Reference] = true
			}
		}
	}
	for _, im := range unusedImages(images, used) {
		if target <= 0 {
			return nil
		}
		a.cfg.Logger.Info("image disk is too full: image removed", "image", im.Id, "tags", im.RepoTags, "bytes", im.Size)
		if err := a.cfg.Images.RemoveImage(ctx, &runtimeapi.ImageSpec{Image: im.Id}); err != nil {
			return fmt.Errorf("remove image %s: %w", im.Id, err)
		}
		target -= int64(im.Size)
	}
	if target > 0 {
		return fmt.Errorf("image disk %s is over %d %% full and no more unused images are left to remove, %d bytes short", dir, a.cfg.ImageGCHigh, target)
	}
	return nil
}

// unusedImages are the images that may go, the largest first.
func unusedImages(images []*runtimeapi.Image, used map[string]bool) []*runtimeapi.Image {
	var out []*runtimeapi.Image
	for _, im := range images {
		keep := im.Pinned || used[im.Id]
		for _, n := range append(append([]string(nil), im.RepoTags...), im.RepoDigests...) {
			keep = keep || used[n]
		}
		if !keep {
			out = append(out, im)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Size > out[j].Size })
	return out
}
