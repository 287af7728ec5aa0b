package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/lifecycle"
)

// pull is the back-off of one image in one pod.
type pull struct {
	delay time.Duration
	until time.Time
	last  string
}

// imageError is why there is no image; reason is that of the waiting container.
type imageError struct {
	reason, message string
	after           time.Duration
}

func (e *imageError) Error() string { return e.reason + ": " + e.message }

// wanted is an image that a container needs: the one it runs, or one that it mounts.
type wanted struct {
	image     string
	policy    corev1.PullPolicy
	container string
	what      string // for messages: "Container image"
}

// imageMounts are the volumes that a container mounts of type image, by name.
func imageMounts(pod *corev1.Pod, spec *corev1.Container) map[string]wanted {
	out := map[string]wanted{}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if v.Image == nil || !slices.ContainsFunc(spec.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name }) {
			continue
		}
		policy := v.Image.PullPolicy
		if policy == "" {
			policy = corev1.PullIfNotPresent
		}
		out[v.Name] = wanted{v.Image.Reference, policy, spec.Name, "Image volume " + v.Name + ": image"}
	}
	return out
}

// ensureImages makes sure that a container's images are here. It returns the ID of the one that it runs, and those of its volumes of
// type image by the volumes' names.
func (w *worker) ensureImages(ctx context.Context, pod *corev1.Pod, spec *corev1.Container) (string, map[string]string, *imageError) {
	id, err := w.ensureImage(ctx, pod, wanted{spec.Image, spec.ImagePullPolicy, spec.Name, "Container image"})
	if err != nil {
		return "", nil, err
	}
	mounts := imageMounts(pod, spec)
	ids := make(map[string]string, len(mounts))
	for _, volume := range slices.Sorted(maps.Keys(mounts)) {
		if ids[volume], err = w.ensureImage(ctx, pod, mounts[volume]); err != nil {
			return "", nil, err
		}
	}
	return id, ids, nil
}

// ensureImage makes sure that the image is here, by its policy, and returns its ID.
func (w *worker) ensureImage(ctx context.Context, pod *corev1.Pod, want wanted) (string, *imageError) {
	is := &runtimeapi.ImageSpec{Image: want.image, UserSpecifiedImage: want.image, Annotations: podAnnotations(pod)}
	r, err := w.a.cfg.Images.ImageStatus(ctx, is, false)
	if err != nil {
		msg := fmt.Sprintf("Failed to inspect image %q: %v", want.image, message(err))
		w.eventOnce(pod, want.container, corev1.EventTypeWarning, "InspectFailed", msg)
		reason := "ImageInspectError"
		if strings.Contains(err.Error(), "invalid reference format") {
			reason = "InvalidImageName"
		}
		return "", &imageError{reason, msg, actionRetry}
	}
	present := r.GetImage().GetId()
	switch {
	case present != "" && want.policy != corev1.PullAlways:
		w.eventf(pod, want.container, corev1.EventTypeNormal, "Pulled", "%s %q already present on machine and can be accessed by the pod", want.what, want.image)
		return present, nil
	case want.policy == corev1.PullNever:
		msg := fmt.Sprintf("%s %q is not present with pull policy of Never", want.what, want.image)
		w.eventOnce(pod, want.container, corev1.EventTypeWarning, "ErrImageNeverPull", msg)
		return "", &imageError{"ErrImageNeverPull", msg, actionRetry}
	}
	id, ierr := w.pullImage(ctx, pod, want, is)
	if ierr != nil && present != "" && w.ranBefore(want.container) {
		// This very pod ran this image here before: a node that cannot reach the registry (or is cut off) restarts it.
		w.eventOnce(pod, want.container, corev1.EventTypeWarning, "Pulled", fmt.Sprintf("Image %q could not be pulled (%s); the copy that this pod already ran is used", want.image, ierr.message))
		return present, nil
	}
	return id, ierr
}

func (w *worker) ranBefore(container string) bool {
	rec := w.a.cfg.Desired.Record(w.uid)
	if rec == nil {
		return false
	}
	_, ok := rec.Containers[container]
	return ok
}

func (w *worker) pullImage(ctx context.Context, pod *corev1.Pod, want wanted, is *runtimeapi.ImageSpec) (string, *imageError) {
	now := time.Now()
	p := w.pulls[want.image]
	if p == nil {
		p = &pull{}
		w.pulls[want.image] = p
	}
	if now.Before(p.until) {
		msg := fmt.Sprintf("Back-off pulling image %q", want.image)
		w.eventOnce(pod, want.container, corev1.EventTypeNormal, "BackOff", msg)
		return "", &imageError{"ImagePullBackOff", msg + ": " + p.last, p.until.Sub(now)}
	}
	w.eventf(pod, want.container, corev1.EventTypeNormal, "Pulling", "Pulling image %q", want.image)
	id, err := w.tryPull(ctx, pod, is)
	if err != nil {
		if ctx.Err() != nil {
			return "", &imageError{"ErrImagePull", "interrupted", 0}
		}
		reason, msg := pullError(want.image, message(err))
		w.eventf(pod, want.container, corev1.EventTypeWarning, "Failed", "Failed to pull image %q: %v", want.image, message(err))
		p.delay = min(max(2*p.delay, lifecycle.BackoffInitial), lifecycle.BackoffMax)
		p.until = time.Now().Add(p.delay)
		p.last = reason + ": " + msg
		// The reason itself is shown first, then that the pod is held back.
		return "", &imageError{reason, msg, p.delay / 4}
	}
	delete(w.pulls, want.image)
	took := time.Since(now).Truncate(time.Millisecond)
	size := uint64(0)
	if r, err := w.a.cfg.Images.ImageStatus(ctx, is, false); err == nil {
		size = r.GetImage().GetSize()
	}
	w.eventf(pod, want.container, corev1.EventTypeNormal, "Pulled", "Successfully pulled image %q in %v (%v including waiting). Image size: %v bytes.", want.image, took, took, size)
	return id, nil
}

// pullError gives the errors that CRI names their own reason.
func pullError(image, msg string) (string, string) {
	for name, why := range map[string]string{"RegistryUnavailable": "the registry is unavailable", "SignatureValidationFailed": "the signature validation failed"} {
		if rest, ok := strings.CutPrefix(msg, name); ok {
			return name, fmt.Sprintf("image pull failed for %s because %s%s", image, why, rest)
		}
	}
	return "ErrImagePull", msg
}

// tryPull tries each credential that fits, or none.
func (w *worker) tryPull(ctx context.Context, pod *corev1.Pod, is *runtimeapi.ImageSpec) (string, error) {
	var secrets []*corev1.Secret
	for _, ref := range pod.Spec.ImagePullSecrets {
		s, err := w.a.cfg.Desired.Secret(pod.Namespace, ref.Name)
		if err != nil {
			w.eventOnce(pod, "", corev1.EventTypeWarning, "FailedToRetrieveImagePullSecret", fmt.Sprintf("Unable to retrieve some image pull secrets (%s); attempting to pull the image may not succeed.", ref.Name))
			continue
		}
		secrets = append(secrets, s)
	}
	sandbox, err := w.sandboxConfig(pod, 0)
	if err != nil {
		return "", err
	}
	auths := credentials(is.Image, secrets)
	if len(auths) == 0 {
		return w.a.cfg.Images.PullImage(ctx, is, nil, sandbox)
	}
	var id string
	for _, a := range auths {
		if id, err = w.a.cfg.Images.PullImage(ctx, is, a, sandbox); err == nil || ctx.Err() != nil {
			return id, err
		}
	}
	return "", err
}

type dockerAuth struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// credentials are those of the pull secrets whose registry (and path) the image lies under, the most specific first.
func credentials(image string, secrets []*corev1.Secret) []*runtimeapi.AuthConfig {
	repo := repository(image)
	type match struct {
		key  string
		auth *runtimeapi.AuthConfig
	}
	var found []match
	for _, s := range secrets {
		auths := map[string]dockerAuth{}
		if b, ok := s.Data[corev1.DockerConfigJsonKey]; ok {
			var f struct {
				Auths map[string]dockerAuth `json:"auths"`
			}
			if json.Unmarshal(b, &f) == nil {
				auths = f.Auths
			}
		} else if b, ok := s.Data[corev1.DockerConfigKey]; ok {
			_ = json.Unmarshal(b, &auths) // a broken secret holds no credential
		}
		for k, d := range auths {
			key := registryKey(k)
			if repo != key && !strings.HasPrefix(repo, strings.TrimSuffix(key, "/")+"/") {
				continue
			}
			a := &runtimeapi.AuthConfig{Username: d.Username, Password: d.Password, IdentityToken: d.IdentityToken, RegistryToken: d.RegistryToken}
			if b, err := base64.StdEncoding.DecodeString(d.Auth); err == nil && d.Auth != "" {
				a.Username, a.Password, _ = strings.Cut(string(b), ":")
			}
			found = append(found, match{key, a})
		}
	}
	sort.SliceStable(found, func(i, j int) bool { return len(found[i].key) > len(found[j].key) })
	out := make([]*runtimeapi.AuthConfig, len(found))
	for i := range found {
		out[i] = found[i].auth
	}
	return out
}

// registryKey brings a key of a Docker configuration (which may be a URL) into the form of repository.
func registryKey(k string) string {
	k = strings.TrimPrefix(strings.TrimPrefix(k, "https://"), "http://")
	k = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(k, "/"), "/v1"), "/v2")
	if k == "index.docker.io" || k == "registry-1.docker.io" {
		k = "docker.io"
	}
	return k
}

// repository is an image's registry and path, without tag and digest.
func repository(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if i := strings.LastIndex(image, ":"); i > strings.LastIndex(image, "/") {
		image = image[:i]
	}
	first, rest, ok := strings.Cut(image, "/")
	if !ok {
		return "docker.io/library/" + image
	}
	if !strings.ContainsAny(first, ".:") && first != "localhost" {
		return "docker.io/" + first + "/" + rest
	}
	return image
}
