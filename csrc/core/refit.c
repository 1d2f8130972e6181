/* refit.c - all scales of a row at once, its codes fixed.
 *
 * With c the codes less their zero-points, c_g those of group g alone and e the row's error,
 * scales s + d give the objective e H e^T - 2 b d^T + d A d^T, where A_gh = c_g H c_h^T and
 * b_g = e H c_g^T: its minimum is d = b A^-1, of as many unknowns as there are groups. H = M + M^T,
 * M its upper triangle with half the diagonal, so products with M are half the work. */
#include <float.h>
#include <math.h>

#include "internal.h"
#include "round.h"

typedef double *restrict lanes;

ptq_status ptq_refit_make(const ptq_kernels *k, ptq_refit *f, const float *H, int64_t n, int64_t G,
                          const int64_t *perm, const int32_t *group, int threads) {
    f->n = n;
    f->G = G;
    f->groups = n / G;
    f->place = ptq_alloc(n, sizeof *f->place);
    int64_t *index = ptq_alloc(n, sizeof *index), *next = ptq_alloc(f->groups, sizeof *next);
    ptq_status status = PTQ_NOMEM;
    if (f->place && index && next) {
        for (int64_t g = 0; g < f->groups; g++) next[g] = g * G;
        for (int64_t i = 0; i < n; i++) {
            const int64_t at = next[group[i]]++;
            f->place[at] = i;
            index[at] = perm[i];
        }
        status = ptq_strips_make(k, &f->H, H, n, index, n, G, PTQ_STRIPS_HALF_DIAGONAL, threads);
    }
    free(index);
    free(next);
    if (status) ptq_refit_free(f);
    return status;
}

void ptq_refit_free(ptq_refit *f) {
    ptq_strips_free(&f->H);
    free(f->place);
    f->place = NULL;
}

/* Per lane: L (groups, groups), at first A, of which the lower triangle; and vectors (groups). */
typedef struct {
    float *C, *E; /* (n, nr) in the order of groups */
    double *L, *b, *root, *d;
} scale_system;

static int64_t system_doubles(const ptq_refit *f, int64_t nr) {
    return (f->groups * f->groups + 3 * f->groups) * nr;
}

int64_t ptq_refit_work(const ptq_refit *f, const ptq_kernels *k) {
    return 2 * f->n * k->gemm.nr + 2 * system_doubles(f, k->gemm.nr);
}

static scale_system carve(const ptq_refit *f, int64_t nr, float *work) {
    scale_system y = {.L = (double *)work};
    y.b = y.L + f->groups * f->groups * nr;
    y.root = y.b + f->groups * nr;
    y.d = y.root + f->groups * nr;
    y.C = (float *)(y.d + f->groups * nr);
    y.E = y.C + f->n * nr;
    return y;
}

static void gather(const ptq_refit *f, int64_t nr, const ptq_refit_panel *p,
                   const scale_system *y) {
    for (int64_t j = 0; j < f->n; j++) {
        const int64_t at = f->place[j] * nr;
        const float *zero = p->zeros + j / f->G * nr;
        for (int64_t r = 0; r < nr; r++) {
            y->C[j * nr + r] = (float)p->codes[at + r] - zero[r];
            y->E[j * nr + r] = p->E[at + r];
        }
    }
}

/* A and b from every strip of M. */
static void accumulate(const ptq_refit *f, const ptq_kernels *k, const scale_system *y) {
    const int64_t nr = k->gemm.nr, mr = k->gemm.mr, groups = f->groups;
    float T[PTQ_MAX_TILE];
    memset(y->L, 0, sizeof(double) * (size_t)((groups + 1) * groups * nr)); /* and b */
    for (int64_t s = 0; s < f->H.count; s++) {
        const int64_t start = f->H.start[s], end = start + f->H.width[s], h = start / f->G;
        const float *M = f->H.data + f->H.offset[s];
        if (ptq_should_stop()) return;
        memset(T, 0, sizeof T);
        k->gemm.f32(T, M, mr, y->E, end);
        k->gemm.dot(f->H.width[s], y->C + start * nr, T, y->b + h * nr);
        for (int64_t g = 0; g <= h; g++) {
            const int64_t k0 = g * f->G, k1 = ptq_min64(k0 + f->G, end);
            memset(T, 0, sizeof T);
            k->gemm.f32(T, M + k0 * mr, mr, y->C + k0 * nr, k1 - k0);
            k->gemm.dot(f->H.width[s], y->C + start * nr, T, y->L + (h * groups + g) * nr);
            k->gemm.dot(f->H.width[s], y->E + start * nr, T, y->b + g * nr);
        }
    }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t r = 0; r < nr; r++) y->L[(g * groups + g) * nr + r] *= 2.0;
}

/* A = L L^T; root holds 1 / L_gg. A group whose pivot is noise, as if all its codes are zero, gets
 * 0 there and in its column: its scale stays. */
static void factorize(const ptq_refit *f, int64_t nr, const scale_system *y) {
    const int64_t groups = f->groups;
    for (int64_t h = 0; h < groups; h++) {
        double *row = y->L + h * groups * nr;
        for (int64_t g = 0; g <= h; g++) {
            const double *other = y->L + g * groups * nr;
            lanes x = row + g * nr, root = y->root + g * nr;
            double sum[PTQ_MAX_NR];
            for (int64_t r = 0; r < nr; r++) sum[r] = x[r];
            for (int64_t i = 0; i < g; i++)
                for (int64_t r = 0; r < nr; r++) sum[r] -= row[i * nr + r] * other[i * nr + r];
            for (int64_t r = 0; g < h && r < nr; r++) x[r] = sum[r] * root[r];
            for (int64_t r = 0; g == h && r < nr; r++) {
                const double pivot = sum[r] > 1e-6 * x[r] ? sqrt(sum[r]) : 0.0;
                root[r] = pivot > 0.0 ? 1.0 / pivot : 0.0;
                x[r] = pivot;
            }
        }
    }
}

/* d = b A^-1. */
static void solve(const ptq_refit *f, int64_t nr, const scale_system *y) {
    const int64_t groups = f->groups;
    for (int64_t g = 0; g < groups; g++) {
        lanes d = y->d + g * nr;
        for (int64_t r = 0; r < nr; r++) d[r] = y->b[g * nr + r];
        for (int64_t i = 0; i < g; i++)
            for (int64_t r = 0; r < nr; r++)
                d[r] -= y->L[(g * groups + i) * nr + r] * y->d[i * nr + r];
        for (int64_t r = 0; r < nr; r++) d[r] *= y->root[g * nr + r];
    }
    for (int64_t g = groups - 1; g >= 0; g--) {
        lanes d = y->d + g * nr;
        for (int64_t i = g + 1; i < groups; i++)
            for (int64_t r = 0; r < nr; r++)
                d[r] -= y->L[(i * groups + g) * nr + r] * y->d[i * nr + r];
        for (int64_t r = 0; r < nr; r++) d[r] *= y->root[g * nr + r];
    }
}

/* Round the scales s + d to their storage type; d becomes what they really change by. One that
 * would not be positive, or does not fit, stays as it is. */
static void round_scales(const ptq_refit *f, int64_t nr, const ptq_refit_panel *p,
                         const scale_system *y, float *scales) {
    const double largest = p->grid->scale_type == PTQ_F16
                               ? 65504.0
                               : (double)FLT_MAX / (2.0 * (double)p->grid->max_code);
    for (int64_t i = 0; i < f->groups * nr; i++) {
        const double wanted = (double)p->scales[i] + y->d[i];
        scales[i] = p->scales[i];
        if (wanted > 0.0 && wanted < largest)
            scales[i] = ptq_round_scale((float)wanted, p->grid->scale_type);
        y->d[i] = (double)scales[i] - (double)p->scales[i];
    }
}

/* change (nr) = d A d^T - 2 b d^T. */
static void evaluate(const ptq_refit *f, int64_t nr, const scale_system *y, double *change) {
    const int64_t groups = f->groups;
    memset(change, 0, sizeof(double) * (size_t)nr);
    for (int64_t g = 0; g < groups; g++) {
        double part[PTQ_MAX_NR] = {0};
        for (int64_t i = g; i < groups; i++)
            for (int64_t r = 0; r < nr; r++)
                part[r] += y->L[(i * groups + g) * nr + r] * y->d[i * nr + r];
        for (int64_t r = 0; r < nr; r++)
            change[r] += part[r] * part[r] - 2.0 * y->b[g * nr + r] * y->d[g * nr + r];
    }
}

void ptq_refit_scales(const ptq_refit *f, const ptq_kernels *k, const ptq_refit_panel *p,
                      float *work) {
    const int64_t nr = k->gemm.nr;
    const scale_system y = carve(f, nr, work);
    double change[PTQ_MAX_NR];
    int better[PTQ_MAX_NR], any = 0;
    gather(f, nr, p, &y);
    accumulate(f, k, &y);
    if (ptq_should_stop()) return;
    factorize(f, nr, &y);
    solve(f, nr, &y);
    float *scales = y.E; /* (groups, nr): E is in b now */
    round_scales(f, nr, p, &y, scales);
    evaluate(f, nr, &y, change);
    for (int64_t r = 0; r < nr; r++) {
        /* What changes less is rounding. */
        better[r] = change[r] < -1e-6 * p->objective[r] && change[r] < 0.0;
        any |= better[r];
        if (better[r]) p->objective[r] += change[r];
    }
    if (!any) return;
    for (int64_t i = 0; i < f->groups; i++)
        for (int64_t r = 0; r < nr; r++)
            if (better[r]) p->scales[i * nr + r] = scales[i * nr + r];
    for (int64_t j = 0; j < f->n; j++) {
        const int64_t at = f->place[j] * nr;
        const float *s = p->scales + j / f->G * nr;
        for (int64_t r = 0; r < nr; r++)
            if (better[r]) p->E[at + r] = p->W[at + r] - s[r] * y.C[j * nr + r];
    }
}
