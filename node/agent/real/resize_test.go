package real

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/node/cri/cgroup"
)

func cpuMemory(cpu, memory string) corev1.ResourceRequirements {
	l := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	return corev1.ResourceRequirements{Requests: l, Limits: l}
}

// limits reads CPU quota and memory limit of a cgroup from the kernel, in whichever hierarchy it has them.
func limits(t *testing.T, path string) string {
	t.Helper()
	hs, err := cgroup.Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	read := func(files ...string) string {
		for _, h := range hs {
			for _, f := range files {
				if b, err := os.ReadFile(filepath.Join(h.Mount, path, f)); err == nil {
					return strings.Fields(string(b))[0]
				}
			}
		}
		return "?"
	}
	return read("cpu.cfs_quota_us", "cpu.max") + " " + read("memory.limit_in_bytes", "memory.max")
}

// testResize resizes a running pod, up and down, with a container that is restarted for memory.
func testResize(t *testing.T, c *realCluster) {
	p := appPod("resize")
	p.Spec.Containers[0].Resources = cpuMemory("100m", "64Mi")
	again := p.Spec.Containers[0]
	again.Name, again.Args = "again", []string{"sleep"}
	again.ResizePolicy = []corev1.ContainerResizePolicy{{ResourceName: corev1.ResourceMemory, RestartPolicy: corev1.RestartContainer}}
	p.Spec.Containers = append(p.Spec.Containers, again)
	c.run(p)
	got := c.wait("resize", "Ready", ready)
	pod := c.cgroups + "/pods/" + string(got.UID)
	expect := func(what, pods, first string, restarts int32) {
		t.Helper()
		s, second := status(got, "c"), status(got, "again")
		have := limits(t, filepath.Join(pod, strings.TrimPrefix(s.ContainerID, "containerd://")))
		if p := limits(t, pod); p != pods || have != first || s.RestartCount != 0 || second.RestartCount != restarts {
			t.Errorf("%s: pod %s, want %s; container %s, want %s; %s", what, p, pods, have, first, statusText(got))
		}
	}
	expect("at first", "20000 134217728", "10000 67108864", 0)
	resize := func(what string, first, second corev1.ResourceRequirements, restarts int32) {
		t.Helper()
		next := got.DeepCopy()
		next.Spec.Containers[0].Resources, next.Spec.Containers[1].Resources = first, second
		next, err := c.admin.CoreV1().Pods("default").UpdateResize(t.Context(), "resize", next, metav1.UpdateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		got = c.wait("resize", what, func(p *corev1.Pod) bool {
			for _, cond := range p.Status.Conditions {
				if cond.Type == corev1.PodResizePending || cond.Type == corev1.PodResizeInProgress {
					return false
				}
			}
			return ready(p) && p.Status.ObservedGeneration >= next.Generation && status(p, "again").RestartCount == restarts
		})
		t.Logf("%s: after %v", what, time.Since(began).Round(time.Millisecond))
		for i, name := range []string{"c", "again"} {
			s, want := status(got, name), got.Spec.Containers[i].Resources
			if s.AllocatedResources.Memory().Cmp(*want.Requests.Memory()) != 0 || s.Resources.Limits.Memory().Cmp(*want.Limits.Memory()) != 0 || s.Resources.Limits.Cpu().Cmp(*want.Limits.Cpu()) != 0 {
				t.Errorf("%s: container %s allocated %v, has %v, want %v", what, name, s.AllocatedResources, s.Resources, want)
			}
		}
	}
	resize("up", cpuMemory("300m", "128Mi"), cpuMemory("200m", "64Mi"), 0)
	expect("up", "50000 201326592", "30000 134217728", 0)
	resize("down, and up with a restart", cpuMemory("50m", "48Mi"), cpuMemory("200m", "96Mi"), 1)
	expect("down", "25000 150994944", "5000 50331648", 1)
	whole := appPod("resize-whole") // what no node declares is refused, not left undone
	has, wants := cpuMemory("100m", "64Mi"), cpuMemory("200m", "64Mi")
	whole.Spec.Resources = &has
	next := c.run(whole)
	next.Spec.Resources = &wants
	if _, err := c.admin.CoreV1().Pods("default").UpdateResize(t.Context(), next.Name, next, metav1.UpdateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("resize of a pod as a whole: %v, want that it is forbidden", err)
	}
	c.delete("resize-whole", 1)
	c.event(t, "resize", "Normal ResizeStarted")
	c.event(t, "resize", "Normal ResizeCompleted")
	c.event(t, "resize", "Normal Killing Container again resize requires restart")
}

// testImageVolume mounts an image, and says why when it cannot.
func testImageVolume(t *testing.T, c *realCluster) {
	with := func(name, image string) *corev1.Pod {
		p := appPod(name)
		p.Spec.Volumes = []corev1.Volume{{Name: "img", VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: image, PullPolicy: corev1.PullNever}}}}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "img", MountPath: "/img"}}
		return p
	}
	c.run(with("imagevolume", appImage))
	c.run(with("imagevolume-none", "skein.local/none:1"))
	got := c.wait("imagevolume", "Ready", ready)
	if code, body := get(t, got, "/file?path=/img/app"); code != 200 || !strings.HasPrefix(body, "\x7fELF") {
		t.Errorf("a file of the image: %d, %d bytes", code, len(body))
	}
	c.wait("imagevolume-none", "the reason", func(p *corev1.Pod) bool {
		w := status(p, "c").State.Waiting
		return w != nil && w.Reason == "ErrImageNeverPull" && strings.Contains(w.Message, `Image volume img: image "skein.local/none:1" is not present`)
	})
	c.event(t, "imagevolume-none", `Warning ErrImageNeverPull Image volume img: image "skein.local/none:1" is not present`)
	c.delete("imagevolume-none", 1)
}
